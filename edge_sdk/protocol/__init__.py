"""What device and coordinator say to each other, and the links that carry it."""
