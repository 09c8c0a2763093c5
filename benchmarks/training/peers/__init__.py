"""What others make of the same teachers, images and generalist, and how long they take."""
