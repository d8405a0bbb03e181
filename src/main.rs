//! The `busway` command.

fn main() -> std::process::ExitCode {
    busway::cli::main()
}
