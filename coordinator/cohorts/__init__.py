"""Who trains a round: clients in this process or in several, and how they are drawn."""
