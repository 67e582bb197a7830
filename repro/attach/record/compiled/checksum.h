/* The checksum of a record: CRC-32, as zlib computes it. */

#include <stdint.h>
#include <string.h>

/* crc_table[i][n]: what half a byte n at position i of four bytes contributes to the value after them. The usual tables
 * of whole bytes are faster in a loop, but they fill 128 cache lines instead of 8. A rank computes between two records,
 * and each line that was replaced by then takes longer than the whole checksum. */
static _Alignas(64) uint32_t crc_table[8][16];

static void crc_prepare(void) {
    for (int i = 0; i < 8; i++)
        for (uint32_t n = 0; n < 16; n++) {
            uint32_t value = n << 4 * i;
            for (int bit = 0; bit < 32; bit++) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
            crc_table[i][n] = value;
        }
}

/* zlib.crc32(data, start), four bytes at a time. */
static uint32_t crc32(const uint8_t *data, size_t size, uint32_t start) {
    uint32_t value = ~start;
    for (; size >= 4; data += 4, size -= 4) {
        uint32_t word;
        memcpy(&word, data, 4);
        word ^= value;
        value = 0;
        for (int i = 0; i < 8; i++) value ^= crc_table[i][word >> 4 * i & 15];
    }
    while (size--) {
        uint32_t byte = (value ^ *data++) & 255;
        value = value >> 8 ^ crc_table[6][byte & 15] ^ crc_table[7][byte >> 4];
    }
    return ~value;
}
