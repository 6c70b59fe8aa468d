//! Messages of headers. Numbers of fields are never used again for something else.

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::session) struct Header {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) payload: u64,
    #[prost(
        oneof = "Kind",
        tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    )]
    pub(in crate::session) kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(in crate::session) enum Kind {
    #[prost(message, tag = "2")]
    Hello(Hello),
    #[prost(message, tag = "3")]
    Ask(Ask),
    #[prost(message, tag = "4")]
    Describe(Describe),
    #[prost(message, tag = "5")]
    Refuse(Refuse),
    #[prost(message, tag = "6")]
    Data(Data),
    #[prost(message, tag = "7")]
    Lost(Lost),
    #[prost(message, tag = "8")]
    Prioritise(Prioritise),
    #[prost(message, tag = "9")]
    Finish(Request),
    #[prost(message, tag = "10")]
    Credit(Number),
    #[prost(message, tag = "11")]
    Ping(Number),
    #[prost(message, tag = "12")]
    Pong(Number),
    #[prost(message, tag = "13")]
    Drain(Number),
    #[prost(message, tag = "14")]
    Lend(Lend),
    #[prost(message, tag = "15")]
    Return(Number),
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Lend {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::session) offset: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::session) loan: u64,
    #[prost(uint64, tag = "4")]
    pub(in crate::session) at: u64,
    #[prost(uint64, tag = "5")]
    pub(in crate::session) length: u64,
    #[prost(uint32, optional, tag = "6")]
    pub(in crate::session) key: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Hello {
    #[prost(uint32, tag = "1")]
    pub(in crate::session) from: u32,
    #[prost(uint32, tag = "2")]
    pub(in crate::session) to: u32,
    #[prost(uint64, tag = "3")]
    pub(in crate::session) features: u64,
    #[prost(uint64, tag = "4")]
    pub(in crate::session) credit: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::session) struct Ask {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint32, tag = "2")]
    pub(in crate::session) priority: u32,
    #[prost(uint64, tag = "3")]
    pub(in crate::session) budget_ms: u64,
    #[prost(uint64, repeated, tag = "4")]
    pub(in crate::session) missing: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Describe {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::session) total: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Refuse {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint32, tag = "2")]
    pub(in crate::session) reason: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Request {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Data {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::session) offset: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Lost {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::session) start: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::session) end: u64,
    #[prost(uint32, tag = "4")]
    pub(in crate::session) reason: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Prioritise {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) request: u64,
    #[prost(uint32, tag = "2")]
    pub(in crate::session) priority: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::session) struct Number {
    #[prost(uint64, tag = "1")]
    pub(in crate::session) number: u64,
}
