//! Messages of headers. Numbers of fields are never used again for something else.

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Header {
    #[prost(uint64, tag = "1")]
    pub(crate) payload: u64,
    #[prost(oneof = "Kind", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    pub(crate) kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Kind {
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
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Hello {
    #[prost(uint32, tag = "1")]
    pub(crate) from: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) to: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) features: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) credit: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Ask {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint32, tag = "2")]
    pub(crate) priority: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) budget_ms: u64,
    #[prost(uint64, repeated, tag = "4")]
    pub(crate) missing: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Describe {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) total: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Refuse {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint32, tag = "2")]
    pub(crate) reason: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Data {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) offset: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Lost {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) start: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) end: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Prioritise {
    #[prost(uint64, tag = "1")]
    pub(crate) request: u64,
    #[prost(uint32, tag = "2")]
    pub(crate) priority: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Number {
    #[prost(uint64, tag = "1")]
    pub(crate) number: u64,
}
