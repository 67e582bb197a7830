"""What witnesses and facts show: where each rank is, which collectives match, which ranks wait for which."""
