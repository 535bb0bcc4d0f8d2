"""Entry points of other programs, each imported by the program that it is for."""
