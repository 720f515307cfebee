"""What a service is made of on Ray Serve: its applications and their versions, endpoints, batches and metrics."""
