"""Programs on TensorRT. Experimental: no engine of it has been built and run on a GPU."""
