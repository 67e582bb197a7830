"""Records of the evidence that other tools wrote about a rank. The rules of `verdict/partial` read these records."""
