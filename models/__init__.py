"""Plain torch: geometry, views, attention, the embedded family. Never imports ComfyUI."""
