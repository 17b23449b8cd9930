"""What is done to the student with a stream of batches: calibrate, then tune."""
