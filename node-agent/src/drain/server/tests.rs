//! Requests to the drain gate over real connections.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[test]
fn every_answer_has_a_verdict() {
    let answered = |verdict: DrainVerdict, waited_for_total| {
        let verdict = verdict as i32;
        describe(&GateAnswer::Answered(DrainAnswer { verdict, waited_for_total, ..DrainAnswer::default() })).0
    };
    assert_eq!(answered(DrainVerdict::Drained, 1), "Drained");
    assert_eq!(answered(DrainVerdict::LastEndpoint, 0), "LastEndpoint");
    assert_eq!(answered(DrainVerdict::TimedOut, 0), "TimedOut");
    assert_eq!(answered(DrainVerdict::TimedOut, 3), "TimedOut");
    assert_eq!(answered(DrainVerdict::NotAnEndpoint, 0), "NotAnEndpoint");
    assert_eq!(describe(&GateAnswer::NoController).0, "NoController");
}

async fn ask(port: u16, head: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

fn gate(port: u16) -> GateSettings {
    GateSettings { port: Some(port), node_addresses: Vec::new() }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn connection_that_was_not_redirected_is_refused_at_once() {
    let (port, wanted) = (free_port(), watch::Sender::new(GateSettings::default()));
    let (notices, mut failures) = mpsc::channel::<ListenFailure>(16);
    tokio::spawn(serve(wanted.subscribe(), Requests::default(), notices));
    wanted.send_replace(gate(port));
    let deadline = Instant::now() + Duration::from_secs(10);
    let text = loop {
        match ask(port, "GET /drained HTTP/1.1\r\nHost: a\r\n\r\n").await {
            Ok(text) => break text,
            Err(_) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
    assert!(text.contains("connect to the address of a pod"), "{text}");
    assert!(failures.try_recv().is_err());
    wanted.send_replace(GateSettings::default());
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
        assert!(Instant::now() < deadline, "still listening");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn occupied_port_is_reported_and_retried() {
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port();
    let wanted = watch::Sender::new(gate(port));
    let (notices, mut failures) = mpsc::channel::<ListenFailure>(16);
    tokio::spawn(serve(wanted.subscribe(), Requests::default(), notices));
    let failure = failures.recv().await.unwrap().0.unwrap();
    assert!(failure.contains(&port.to_string()), "{failure}");
    drop(occupied);
    let recovered = tokio::time::timeout(2 * BIND_RETRY, failures.recv()).await.unwrap().unwrap();
    assert!(recovered.0.is_none());
}
