"""The app that the other system's server runs."""
