"""How any module becomes stages and exits: it is run once, what it does is written down, and that
is cut where one tensor passes."""
