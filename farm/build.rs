//! The migrations are part of the library, but lie beside it.

fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
