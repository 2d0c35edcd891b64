"""Training: the steps, the curriculum, the loop, what it saves and reports."""
