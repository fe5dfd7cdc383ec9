"""The coordinator's end of every link: one socket, who may connect, how much a peer may say."""
