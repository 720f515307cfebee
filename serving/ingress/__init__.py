"""What stands in front of the replicas: the port, HAProxy, API keys and the access log."""
