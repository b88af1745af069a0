//! Tiles of `bf16` (Intel AMX).

/// Whether the processor has the tiles and the system lets this process use them.
pub(super) fn is_available() -> bool {
    false
}
