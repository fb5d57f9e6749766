"""What clients and servers of activations agree on before anything is loaded."""

TOKEN_VARIABLE = "EVERYSCOPE_TOKEN"
"""The environment variable that holds the token, for servers and for clients."""
