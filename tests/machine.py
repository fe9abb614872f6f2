"""What the tests may expect of the machine that they run on: nothing of its speed."""

from __future__ import annotations

# Seconds after which a process counts as hung. No test may fail on a slow or busy machine: this is far beyond what any
# of them takes, and is there so that a hang ends.
PATIENCE = 3600.0
