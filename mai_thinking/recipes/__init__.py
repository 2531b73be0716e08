"""What is different about each kind of run: pre-training, reinforcement learning, self-distillation."""
