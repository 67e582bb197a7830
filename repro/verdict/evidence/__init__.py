"""What witnesses and facts show: where each rank is, which collectives match, which rank waits for which other."""
