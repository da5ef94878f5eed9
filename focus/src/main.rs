//! The program `focus`: see `focus --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    antiphon_focus::cli::main()
}
