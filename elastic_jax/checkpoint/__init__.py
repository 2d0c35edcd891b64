"""One Orbax checkpoint holds the parent and every budget; a slice reads about its own bytes."""
