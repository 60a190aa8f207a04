"""Images, the frozen autoencoder, and the particles that training draws from."""
