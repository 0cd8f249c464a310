"""What a user runs: the command line and the recipes that combine the library."""
