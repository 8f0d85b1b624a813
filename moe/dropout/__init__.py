"""SMoE-Dropout: dense models made self-slimmable. Import its public names from `moekit.moe`."""
