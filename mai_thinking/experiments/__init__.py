"""What starts runs: the climb stage by stage, studies, ladders; one work queue for all three."""
