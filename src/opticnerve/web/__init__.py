"""What the server and the browser interface both stand on: where they listen, whom they let in."""
