"""Small tools that every room may use: files, text, logs, imports, interrupts."""
