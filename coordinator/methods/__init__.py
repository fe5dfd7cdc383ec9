"""The federated methods, one file each: what a client trains, and what is made of its update."""
