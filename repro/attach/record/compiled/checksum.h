/* The checksum of a record: CRC-32, as zlib computes it. */

#include <stdint.h>
#include <string.h>

static uint32_t crc_table[8][256];

static void crc_prepare(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
        crc_table[0][byte] = value;
    }
    for (int byte = 0; byte < 256; byte++)
        for (int i = 1; i < 8; i++)
            crc_table[i][byte] = crc_table[i - 1][byte] >> 8 ^ crc_table[0][crc_table[i - 1][byte] & 255];
}

/* zlib.crc32(data, start), eight bytes at a time. */
static uint32_t crc32(const uint8_t *data, size_t size, uint32_t start) {
    uint32_t value = ~start;
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= value;
        value = crc_table[7][low & 255] ^ crc_table[6][low >> 8 & 255] ^ crc_table[5][low >> 16 & 255] ^
                crc_table[4][low >> 24] ^ crc_table[3][high & 255] ^ crc_table[2][high >> 8 & 255] ^
                crc_table[1][high >> 16 & 255] ^ crc_table[0][high >> 24];
    }
    if (size >= 4) {
        uint32_t word;
        memcpy(&word, data, 4);
        word ^= value;
        value = crc_table[3][word & 255] ^ crc_table[2][word >> 8 & 255] ^ crc_table[1][word >> 16 & 255] ^
                crc_table[0][word >> 24];
        data += 4, size -= 4;
    }
    while (size--) value = value >> 8 ^ crc_table[0][(value ^ *data++) & 255];
    return ~value;
}
