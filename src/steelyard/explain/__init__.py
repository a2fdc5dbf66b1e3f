"""Why a model said so: what each part of an input did to an output, and how far that can be believed."""
