//! `make demo` shows what it claims, and its printed commands work on the cluster that it keeps.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use switchtower_e2e::lab::process::Process;
use switchtower_e2e::lab::programs;
use switchtower_e2e::lab::wait;

/// Runs the demonstration with `--keep` until it waits for Ctrl-C.
fn kept_demo(log: &std::path::Path) -> Process {
    let mut command = Command::new(programs::workspace("demo").unwrap());
    command.arg("--keep");
    let demo = Process::start("demo", command, log).unwrap();
    wait::until("the demonstration ended early", Duration::from_secs(180), || {
        demo.check_running()?;
        ensure!(demo.log_text().contains("The cluster runs until Ctrl-C"), "{}", demo.log_text());
        Ok(())
    })
    .unwrap();
    demo
}

fn shell(script: &str) -> String {
    let output = Command::new("bash").args(["-ec", script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {text}{errors}");
    text
}

#[test]
fn demo_shows_every_scene_and_can_be_explored() {
    let folder = tempfile::tempdir().unwrap();
    let demo = kept_demo(&folder.path().join("demo.log"));
    let printed = demo.log_text();
    for expected in [
        "4 pods on 3 nodes answer",
        "DROPPED  LoadBalancer 203.0.113.10:80/TCP on gamma",
        "why       ProbeFailed on node",
        "two nodes never got the change",
        "3 of 3 connected nodes hold it",
        "! ST0103  the node has not applied the latest changes: 1 node (gamma)",
        "all three kernels hold the latest generation",
    ] {
        assert!(printed.contains(expected), "not shown: {expected}\n{printed}");
    }
    // Every printed command except the one that never exits.
    let explore = printed.split("── Explore").nth(1).unwrap();
    let commands: Vec<_> = explore.lines().filter(|line| line.starts_with("  ")).map(str::trim).collect();
    assert!(commands.len() >= 8, "{explore}");
    let source = commands[0];
    for command in commands.iter().filter(|command| !command.starts_with("tail -f")) {
        // `explain` exits with 1 if it explains a drop.
        let tolerated = if command.contains("explain") { "|| [ $? = 1 ]" } else { "" };
        let text = shell(&format!("{source}; {command} {tolerated}"));
        let looks_broken = text.contains("Pending") || text.contains("0/1");
        assert!(!command.starts_with("kubectl get") || !looks_broken, "{command}: {text}");
    }
    demo.signal(libc::SIGINT);
    demo.wait(Duration::from_secs(20)).unwrap();
    let directory = source.trim_start_matches(". ").trim_end_matches("/environment");
    assert!(!std::path::Path::new(directory).exists(), "{directory} remains");
}
