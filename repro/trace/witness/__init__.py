"""The witness file of one rank: its format, and how it is read, followed while it grows, shortened, and rewound."""
