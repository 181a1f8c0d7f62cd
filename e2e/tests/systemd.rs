//! The systemd unit in `examples/systemd`: systemd accepts it, and its command line is valid. `e2e/tests/identity.rs`
//! covers the token that it uses.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::fs;
use std::process::Command;

use clap::Parser as _;
use switchtower_node_agent::cli::Cli;

/// The unit with an existing program, because systemd checks that programs exist.
fn unit() -> String {
    let text = fs::read_to_string("../examples/systemd/switchtower-node-agent.service").unwrap();
    assert_eq!(text.matches("/usr/local/bin/switchtower-node-agent").count(), 2);
    text
}

#[test]
fn systemd_accepts_the_unit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("switchtower-node-agent.service");
    fs::write(&file, unit().replace("/usr/local/bin/switchtower-node-agent", "/bin/true")).unwrap();
    let verify = |file: &std::path::Path| {
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(file).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // Complaints about other units of this machine do not name the file.
    let about = |errors: &str| errors.lines().any(|line| line.contains("switchtower-node-agent"));
    let (accepted, errors) = verify(&file);
    assert!(accepted && !about(&errors), "{errors}");
    fs::write(&file, unit().replace("Type=exec", "Type=nonsense")).unwrap();
    assert!(about(&verify(&file).1), "the check can fail");
}

#[test]
fn agent_accepts_command_lines_of_the_unit() {
    let text = unit().replace("\\\n", " ").replace("${NODE_NAME}", "edge-1");
    for key in ["ExecStartPre=+", "ExecStart="] {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        Cli::try_parse_from(line.split_whitespace()).unwrap();
    }
}
