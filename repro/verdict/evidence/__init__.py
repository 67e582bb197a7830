"""What witnesses and facts show: where each rank is, which collectives match, who waits for whom."""
