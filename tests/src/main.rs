//! The binary under test: `kiln` itself, built beside the tests.

fn main() -> std::process::ExitCode {
    kiln::main()
}
