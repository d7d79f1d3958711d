"""What connects the front process with rank 0 of a replica: messages (channel) and pixels (tensor_queue)."""
