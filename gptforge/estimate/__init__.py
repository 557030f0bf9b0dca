"""What a run will be and cost, and whether it fits, before anything is trained."""
