"""A model for each client, made by networks of the server: hypernetworks."""
