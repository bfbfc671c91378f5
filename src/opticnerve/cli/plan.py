EPILOG=""
def plan(recipe: str) -> None:
    """Plan."""
