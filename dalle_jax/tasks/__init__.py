"""What a training optimises: tasks, and the jobs that hold them with their batches."""
