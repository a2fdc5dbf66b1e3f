"""OpenAI's shapes: what requests may hold, what responses look like, what errors look like."""
