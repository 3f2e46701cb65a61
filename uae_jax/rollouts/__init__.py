"""What rollouts sample: captions of images, and images of captions."""
