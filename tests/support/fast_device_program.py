"""`edge-sdk` for a coordinator that a test starts or kills: it looks for that twice a second, not
after pauses that grow to 5 s for the connection and to 15 s for the hello."""

import sys
from functools import partial

from edge_sdk.agent import agent, state
from edge_sdk.cli.main import main
from edge_sdk.protocol import link

PAUSE_S = 0.5

if __name__ == "__main__":
    link.RECONNECT_MAX_MS = int(1000 * PAUSE_S)
    state.HELLO_S = state.HELLO_MAX_S = agent.REFUSED_S = PAUSE_S
    agent.State = partial(state.State, hello_pause_s=PAUSE_S, refused_pause_s=PAUSE_S)
    sys.exit(main())
