"""Who may join: the list of clients, invitations, keys that wait."""
