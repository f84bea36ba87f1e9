from regard import _backend
