//! The `kiln` binary; everything lies in the library, so that tests can build it under another name.

fn main() -> std::process::ExitCode {
    kiln::main()
}
