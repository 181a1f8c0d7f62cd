//! Queries to agents over their streams.

use super::*;

#[tokio::test]
async fn query_travels_over_the_stream_and_returns_its_answer() {
    let lab = Lab::start(Limits::default()).await;
    let question = || Kind::Frontends(FrontendsQuery { limit: 3 });
    let refused = lab.fleet.ask("n9", question()).await;
    assert_eq!(refused, Err(QueryError::UnknownNode("n9".to_owned())));
    let refused = lab.fleet.ask("n1", question()).await;
    assert_eq!(refused, Err(QueryError::NotConnected("n1".to_owned())));

    let mut agent = lab.agent("n1").await;
    agent.welcome(hello("n1")).await;
    let (update, _) = agent.update().await;
    let fleet = lab.fleet.clone();
    let asked = tokio::spawn(async move { fleet.ask("n1", question()).await });
    let ToAgent::Query(query) = agent.next().await else { panic!("Query") };
    assert_eq!(query.kind, Some(question()));
    // An acknowledgement in between is no matter.
    let part = |part: &str, last| Answer { id: query.id, part: part.into(), last, ..Answer::default() };
    agent.send(FromAgent::Answer(part("first, ", false))).await;
    agent.ack(&update).await;
    agent.send(FromAgent::Answer(part("second", true))).await;
    assert_eq!(asked.await.unwrap().unwrap(), b"first, second");

    let fleet = lab.fleet.clone();
    let asked = tokio::spawn(async move { fleet.ask("n1", question()).await });
    assert!(matches!(agent.next().await, ToAgent::Query(_)));
    drop(agent);
    assert_eq!(asked.await.unwrap(), Err(QueryError::Ended("n1".to_owned())));
}
