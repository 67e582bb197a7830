"""The witness file of one rank: its format, how it is read, followed while it grows, shortened, and rewound."""
