"""What changes over thousands of steps, as pure functions and state machines (stdlib only)."""
